"""The page report/index.html: one HTML file, without scripts or network, and its plots."""
