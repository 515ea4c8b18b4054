"""Handing a trained encoder over to other libraries."""
