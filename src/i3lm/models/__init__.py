"""Model families, in the shape that transformers expects."""
