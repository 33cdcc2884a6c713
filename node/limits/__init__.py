"""Memory, CPU and pids limits by cgroup v1 and v2, found by trying them."""
