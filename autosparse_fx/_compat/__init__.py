"""Every private import from torch, each with its reason and the versions that it was seen to work on.

Versions: torch 2.11.0 (the oldest supported) and 2.15.0. One module for each part of torch: eager mode, Dynamo, its
graphs, AOTAutograd, Inductor.
"""
