"""Recipes: one file for each published or own result; the only place where the parts meet."""
