"""How long a test may hang: the one place for limits of time.

They end what would never end, and nothing else: on a machine whose cores are busy with other work a test may take
many times what it takes alone. What a test proves is never how long something took.
"""

# A process that a test has started, and a test: the process ends first, so that what it printed is shown.
PROCESS_SECONDS = 3600
TEST_SECONDS = 2 * PROCESS_SECONDS
