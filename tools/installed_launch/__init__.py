"""The installed name ``launch``: ``python -m launch.serve`` from any directory runs `phalanx.launch.serve`.

In a checkout the folder ``launch`` itself has this name.
"""

import phalanx.launch

__path__ = phalanx.launch.__path__
