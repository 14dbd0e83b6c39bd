"""What the stages need and no paper describes. Importing it quiets transformers' start-up notices."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns when torchvision is missing
