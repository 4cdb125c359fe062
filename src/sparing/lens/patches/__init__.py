"""Parts of the patch benchmark: where a token's pixels are, what is drawn there, what is asked."""
