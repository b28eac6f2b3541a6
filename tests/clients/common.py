"""What the scripts share: where the server is, and a form that a small model can fill in."""

import os

from pydantic import BaseModel

URL, MODEL = os.environ["CLIENTS_URL"], os.environ["CLIENTS_MODEL"]


class Flag(BaseModel):
    """Whether it is so."""

    yes: bool
