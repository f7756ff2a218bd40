"""Operations of the model with their reference and, where built, faster implementations.

Use the functions of :mod:`wireframe.kernels.ops`; nothing else here is public.
"""

if __name__ == "kernels":
    raise ImportError(
        "this folder is the package 'wireframe.kernels': write 'from wireframe.kernels import ops' "
        "('kernels' alone is the name of another project on PyPI)"
    )
