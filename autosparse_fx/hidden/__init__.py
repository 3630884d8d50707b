"""The one-line form: thresholds of models that were never prepared, hidden beside the weights and not in the model.

``masks.py`` keeps them, ``registration.py`` decides which weights get them, ``graph.py`` binds a compiled graph to
them, ``training.py`` trains them behind the user's optimizer, ``asked.py`` finds models that were to have them and that
Dynamo never captured, ``state.py`` saves and loads them.
"""
