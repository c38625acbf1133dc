//! Media types of layers.

use sluice_layer::Format;
use sluice_oci::Descriptor;
use sluice_oci::media_type::{
    DOCKER_LAYER, DOCKER_LAYER_GZIP, OCI_LAYER, OCI_LAYER_GZIP, OCI_LAYER_ZSTD,
};

const OCI_FOREIGN: &str = "application/vnd.oci.image.layer.nondistributable.v1.tar";
const OCI_FOREIGN_GZIP: &str = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip";
const OCI_FOREIGN_ZSTD: &str = "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd";
const DOCKER_FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar";
const DOCKER_FOREIGN_GZIP: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";

/// Whether Sluice knows the type as that of a layer.
pub(crate) fn is_layer(media_type: &str) -> bool {
    let docker_zstd = "application/vnd.docker.image.rootfs.diff.tar.zstd";
    [
        OCI_LAYER,
        OCI_LAYER_GZIP,
        OCI_LAYER_ZSTD,
        DOCKER_LAYER,
        DOCKER_LAYER_GZIP,
        docker_zstd,
    ]
    .contains(&media_type)
}

/// Whether the layer is fetched from elsewhere and must not be copied.
pub(crate) fn is_foreign(layer: &Descriptor) -> bool {
    [
        OCI_FOREIGN,
        OCI_FOREIGN_GZIP,
        OCI_FOREIGN_ZSTD,
        DOCKER_FOREIGN,
        DOCKER_FOREIGN_GZIP,
    ]
    .contains(&layer.media_type.as_str())
}

/// The OCI type that means the same as a Docker type.
pub(crate) fn to_oci(media_type: &str) -> &str {
    match media_type {
        DOCKER_LAYER => OCI_LAYER,
        DOCKER_LAYER_GZIP => OCI_LAYER_GZIP,
        "application/vnd.docker.image.rootfs.diff.tar.zstd" => OCI_LAYER_ZSTD,
        DOCKER_FOREIGN => OCI_FOREIGN,
        DOCKER_FOREIGN_GZIP => OCI_FOREIGN_GZIP,
        other => other,
    }
}

/// The type of a layer in that format.
pub(crate) fn of_format(format: Format) -> &'static str {
    match format {
        Format::Estargz => OCI_LAYER_GZIP,
        Format::ZstdChunked => OCI_LAYER_ZSTD,
    }
}
