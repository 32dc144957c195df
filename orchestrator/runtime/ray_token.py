"""To be imported before ray: has Ray show, and ask for, the token in the user's ~/.ray.

Ray asks for it on a cluster that it starts, but by default does not show it to one that it joins, and waits
20 s before it says so. It reads this variable when it is imported.
"""

import os

os.environ.setdefault("RAY_AUTH_MODE", "token")
