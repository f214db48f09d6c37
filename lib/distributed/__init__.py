"""The processes of a run: how they meet, agree, stop, and notice a lost one."""
