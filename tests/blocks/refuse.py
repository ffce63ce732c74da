def refuse(rest):
    if rest:
        raise NotImplementedError(f"No reader knows these fields: {rest}")
