"""Rows, shares and pixels as text, HTML and figures; knows no report."""
