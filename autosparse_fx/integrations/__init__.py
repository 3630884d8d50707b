"""Callbacks for training frameworks, one module for each: ``lightning`` and ``transformers``.

Each module needs its framework, which is imported with it and not before.
"""
