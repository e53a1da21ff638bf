"""Model definitions: plain functions over Ops and the declaration of their weights."""
