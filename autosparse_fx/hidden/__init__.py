"""The one-line form: thresholds of models that were never prepared, hidden beside the weights and not in the model.

``masks.py`` keeps them, ``graph.py`` binds a compiled graph to them, ``training.py`` trains them behind the user's
optimizer, ``state.py`` saves and loads them.
"""
