"""Poisoned training sets and backdoored models: how they are made, and how they are found."""
