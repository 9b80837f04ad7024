"""A gateway's reports: metrics, arrivals, the request log, shadow requests, calibration."""
