"""The addresses, one blueprint per resource."""
