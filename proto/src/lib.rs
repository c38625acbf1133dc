//! gRPC definitions: containerd's snapshots service and Sluice's own control
//! service. The meaning of every call stands in the `.proto` files.

#![allow(
    missing_docs,
    unreachable_pub,
    reason = "generated code; the .proto files document it"
)]

/// containerd's API, as far as a proxy snapshotter speaks it.
pub mod containerd {
    pub mod types {
        tonic::include_proto!("containerd.types");
    }
    pub mod services {
        pub mod snapshots {
            pub mod v1 {
                tonic::include_proto!("containerd.services.snapshots.v1");
            }
        }
    }
}

/// Sluice's own service.
pub mod control {
    pub mod v1 {
        tonic::include_proto!("sluice.control.v1");
    }
}
