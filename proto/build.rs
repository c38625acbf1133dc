//! Compiles the protocol definitions under `proto/`.

fn main() -> std::io::Result<()> {
    tonic_prost_build::configure().compile_protos(
        &[
            "proto/containerd/services/snapshots/v1/snapshots.proto",
            "proto/sluice/control/v1/control.proto",
            "proto/sluice/control/v1/scrub.proto",
        ],
        &["proto"],
    )
}
