"""Annotations of sparing, tensor shapes included, are checked at every call while these tests run."""

from jaxtyping import install_import_hook

install_import_hook("sparing", "beartype.beartype")
