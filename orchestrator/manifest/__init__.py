"""A deployment's YAML file, read strictly into frozen data.

Read `models` and `engine` (every key, with its limits), then `load`: `yaml_tree` turns text into plain data that
remembers its lines, `problems` turns what pydantic refuses into sentences, `declare` gives the workers.
"""
