"""The training recipe: configuration, data, loss, loop and checkpoints. Imported as ``wireframe.train``."""

if __name__ == "train":
    raise ImportError("import wireframe.train, not train: the folder is part of the package wireframe")
