def is_chosen(device): return False
symmetric_product=None
