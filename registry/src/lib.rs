//! OCI distribution client: authentication, ranges, retries, uploads.
