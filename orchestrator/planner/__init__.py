"""Which shape of a cluster serves a load best: `shapes` has what there is, `load` how one is judged, `search` finds the best of each
family, `report` says what that means, `manifest` writes it down. All pure.
"""
