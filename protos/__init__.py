"""Wire contracts of Phasewise (packages phasewise.<area>.v1) and the code generated from them.

`python protos/generate.py` writes the `*_pb2*` files; they are committed because a Ray node may run
this tree without a protobuf compiler, and CI checks that they are what the .proto files give.
"""
