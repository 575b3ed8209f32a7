"""What a serving engine needs to hold less for local heads; knows no engine.

``plan``: heads of each layer and rank, bytes, capacity. ``weights``: permuted checkpoints, so that a layer's
full heads are contiguous. ``slots``: where a local head's tokens live. ``extend``, ``decode``: its attention.
"""
