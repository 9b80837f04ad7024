"""What a gateway reports: metrics, arrivals, the request log, shadow requests, calibration."""
