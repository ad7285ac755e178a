"""Files: what kind one is, its tensors or module without running its code, and safe writing.

`recognise` looks at content only, `weights` and `architecture` load on its word (`archive` and `pickles` read
for all three), `files` writes. Nothing here knows what an objective, an operator or a result is.
"""
