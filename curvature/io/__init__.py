"""Files: what kind one is, its tensors or module without running its code, and safe writing.

`recognise` looks at content only, `weights` and `architecture` load on its word (reading through `archive`,
`pickles` and `safe`), `files` writes. Nothing here knows what an objective, an operator or a result is.
"""
