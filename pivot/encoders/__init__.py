"""The vision encoder: what its configuration says, its weights cut behind the feature layer, and its way back to disk.

An encoder library is one file (`transformers.py`, `open_clip.py`, `timm.py`) with the functions of
`library.EncoderLibrary`, and one line in the dict `LIBRARIES` of `library.py`. Nothing outside of this package asks
which library an encoder is of.

    facts.py    what data and model must agree on: pixels, patches, normalisation
    square.py   how an image becomes the encoder's square, and which way a stock image processor takes
    library.py  the functions of a library, the dict, and `resolve_encoder`: settings -> Encoder, without weights
    families.py what tells transformers' encoders apart; positions.py, their positions at another image size
    tower.py    VisionTower, the module that a run trains
    export.py   the encoder alone as its library writes it, read back and compared

Data, processor and models import this package; it imports none of them.
"""
