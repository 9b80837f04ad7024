"""OpenTelemetry: records the spans of requests and exports them by OTLP."""
