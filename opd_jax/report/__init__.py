"""Figures and one page of what runs and the instrument wrote; reads files only."""
