"""Pictures as SVG, drawn by hand."""
