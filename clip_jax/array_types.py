"""Shapes and dtypes in signatures: jaxtyping's annotations where it is installed, plain names where it is not.

Letters: b batch, l tokens, d width, h heads, e embedding, s image side. The tests check the annotations at run
time; a training machine needs neither jaxtyping nor the check.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Num
else:
    try:
        from jaxtyping import Array, Bool, Float, Int, Num
    except ModuleNotFoundError:

        class _Unchecked:
            """Stands in for a jaxtyping dtype: `Float[Array, "b e"]` then reads as `Any`."""

            def __class_getitem__(cls, _item):
                return Any

        Array = Any
        Bool = Float = Int = Num = _Unchecked

__all__ = ["Array", "Bool", "Float", "Int", "Num"]
