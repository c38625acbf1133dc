// Command reference writes and reads seekable layers with stargz-snapshotter's
// own library, and unpacks tars with containerd's, for Sluice's tests of
// interoperability.
//
//	reference build FORMAT CHUNK_SIZE BLOB [PRIORITIZED]...
//	    makes the tar on standard input a layer; prints its annotations
//	reference dump BLOB TOC_DIGEST
//	    verifies the TOC and every chunk; prints one JSON object a name
//	reference unpack DIRECTORY
//	    applies the tar on standard input as containerd does for overlayfs
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	"sort"
	"strconv"

	"github.com/containerd/containerd/archive"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) >= 4 && args[0] == "build":
		return build(args[1], args[2], args[3], args[4:])
	case len(args) == 3 && args[0] == "dump":
		return dump(args[1], digest.Digest(args[2]))
	case len(args) == 2 && args[0] == "unpack":
		_, err := archive.Apply(context.Background(), args[1], os.Stdin,
			archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
		return err
	}
	return fmt.Errorf("usage: reference build FORMAT CHUNK_SIZE BLOB [PRIORITIZED]... | dump BLOB TOC_DIGEST | unpack DIRECTORY")
}

type zstdCompression struct {
	*zstdchunked.Decompressor
	*zstdchunked.Compressor
}

func build(format, chunkSize, blobPath string, prioritized []string) error {
	size, err := strconv.Atoi(chunkSize)
	if err != nil {
		return err
	}
	tar, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	annotations := map[string]string{}
	options := []estargz.Option{
		estargz.WithChunkSize(size),
		estargz.WithPrioritizedFiles(prioritized),
	}
	switch format {
	case "estargz":
	case "zstd-chunked":
		options = append(options, estargz.WithCompression(zstdCompression{
			new(zstdchunked.Decompressor),
			&zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault, Metadata: annotations},
		}))
	default:
		return fmt.Errorf("unknown format %q", format)
	}
	blob, err := estargz.Build(io.NewSectionReader(bytes.NewReader(tar), 0, int64(len(tar))), options...)
	if err != nil {
		return err
	}
	out, err := os.Create(blobPath)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, blob); err != nil {
		return err
	}
	if err := blob.Close(); err != nil {
		return err
	}
	if err := out.Close(); err != nil {
		return err
	}
	annotations[estargz.TOCJSONDigestAnnotation] = blob.TOCDigest().String()
	return json.NewEncoder(os.Stdout).Encode(annotations)
}

// file is what a reader sees under one name.
type file struct {
	Path     string            `json:"path"`
	Type     string            `json:"type"`
	Mode     int64             `json:"mode"`
	UID      int               `json:"uid"`
	GID      int               `json:"gid"`
	MTime    int64             `json:"mtime"`
	Links    int               `json:"links"`
	Size     int64             `json:"size"`
	LinkName string            `json:"linkName"`
	DevMajor int               `json:"devMajor"`
	DevMinor int               `json:"devMinor"`
	Xattrs   map[string][]byte `json:"xattrs"`
	// Content is the SHA-256 of a regular file, read through its chunks.
	Content string `json:"content"`
	Chunks  int    `json:"chunks"`
}

func dump(blobPath string, tocDigest digest.Digest) error {
	blob, err := os.Open(blobPath)
	if err != nil {
		return err
	}
	info, err := blob.Stat()
	if err != nil {
		return err
	}
	reader, err := estargz.Open(io.NewSectionReader(blob, 0, info.Size()),
		estargz.WithDecompressors(new(zstdchunked.Decompressor)))
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	verifier, err := reader.VerifyTOC(tocDigest)
	if err != nil {
		return fmt.Errorf("verify TOC: %w", err)
	}
	root, ok := reader.Lookup("")
	if !ok {
		return fmt.Errorf("no root")
	}
	out := bufio.NewWriter(os.Stdout)
	if err := walk(reader, verifier, root, "", json.NewEncoder(out)); err != nil {
		return err
	}
	return out.Flush()
}

func walk(reader *estargz.Reader, verifier estargz.TOCEntryVerifier, entry *estargz.TOCEntry, name string, out *json.Encoder) error {
	seen := file{
		Path:     name,
		Type:     entry.Type,
		Mode:     entry.Mode & 0o7777,
		UID:      entry.UID,
		GID:      entry.GID,
		Links:    entry.NumLink,
		Size:     entry.Size,
		LinkName: entry.LinkName,
		DevMajor: entry.DevMajor,
		DevMinor: entry.DevMinor,
		Xattrs:   entry.Xattrs,
	}
	if !entry.ModTime().IsZero() {
		seen.MTime = entry.ModTime().Unix()
	}
	if entry.Type == "reg" {
		var err error
		if seen.Content, seen.Chunks, err = content(reader, verifier, entry); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if err := out.Encode(seen); err != nil {
		return err
	}
	children := map[string]*estargz.TOCEntry{}
	var names []string
	entry.ForeachChild(func(base string, child *estargz.TOCEntry) bool {
		children[base] = child
		names = append(names, base)
		return true
	})
	sort.Strings(names)
	for _, base := range names {
		if err := walk(reader, verifier, children[base], path.Join(name, base), out); err != nil {
			return err
		}
	}
	return nil
}

// content reads a file chunk by chunk and checks each against its digest.
func content(reader *estargz.Reader, verifier estargz.TOCEntryVerifier, entry *estargz.TOCEntry) (string, int, error) {
	whole := sha256.New()
	chunks := 0
	if entry.Size > 0 {
		payload, err := reader.OpenFile(entry.Name)
		if err != nil {
			return "", 0, err
		}
		for at := int64(0); at < entry.Size; chunks++ {
			chunk, ok := reader.ChunkEntryForOffset(entry.Name, at)
			if !ok {
				return "", 0, fmt.Errorf("no chunk at %d", at)
			}
			check, err := verifier.Verifier(chunk)
			if err != nil {
				return "", 0, err
			}
			section := io.NewSectionReader(payload, chunk.ChunkOffset, chunk.ChunkSize)
			if _, err := io.CopyN(io.MultiWriter(whole, check), section, chunk.ChunkSize); err != nil {
				return "", 0, fmt.Errorf("chunk at %d: %w", at, err)
			}
			if !check.Verified() {
				return "", 0, fmt.Errorf("chunk at %d has not the digest in the TOC", at)
			}
			at += chunk.ChunkSize
		}
	}
	return fmt.Sprintf("sha256:%x", whole.Sum(nil)), chunks, nil
}
