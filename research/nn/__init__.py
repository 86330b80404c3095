"""The layers every model is built from, one file per kind of layer."""
