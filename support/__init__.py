"""What the stages need and no paper describes. Its import quiets transformers' notices."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns when torchvision is missing
