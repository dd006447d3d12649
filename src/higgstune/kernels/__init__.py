IGNORE = -100  # label entries with this value carry no loss, as in torch's cross entropy; here, to need no torch
