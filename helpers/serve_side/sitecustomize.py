"""Python runs this first in each of vLLM's processes: `helpers.serving` puts it on their path.

Before it serves, vLLM imports itself, torch and Transformers, in two processes, and nothing of it
is garbage. At Python's own threshold of 700 new objects the collector looks
through them again and again; at this one a server of the bundled model was ready after 16.1 s and
not 18.5 s (medians of four starts in turn on two cores). vLLM freezes what is there when it serves.
"""

import gc

gc.set_threshold(100_000, 50, 100)
