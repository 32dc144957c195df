"""What the GPUs that this process sees can do about sharing: `python -m workers.device`."""

import torch

from workers.device.capability import report
from workers.device.device_facts import device_facts

for index in range(max(1, torch.cuda.device_count())):
    print("\n".join(report(device_facts(index))))
