"""Published algorithms that decide shares, roles, places and admission: functions of what they are told, and nothing else."""
