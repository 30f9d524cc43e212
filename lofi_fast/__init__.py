"""lofi_fast: end-to-end temporal action localization on one ordinary GPU, within a stated memory budget.

Importing the package is light: torch is imported by the rooms that compute, not here.
"""

__version__ = "0.1.0"
