"""Measurements of the parts against their rivals. Imported as ``wireframe.bench``."""

if __name__ == "bench":
    raise ImportError("import wireframe.bench, not bench: the folder is part of the package wireframe")
