"""Self-supervised pretraining of Vision Transformers.

Shape letters used in every docstring and comment:

    B batch            N patches          L visible patches   M masked patches
    D embed_dim        P prefix tokens    G, V global/all views
    K prototypes or vocabulary            T text length
    C channels         H, W pixels        h, w patch grid     p patch size

Importing this package imports nothing heavy.
"""

__version__ = "0.1.0"
