// Runs containerd's own snapshotter suite, from Debian's development package,
// against the daemon and against containerd's overlayfs snapshotter.
package conformance

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/overlay"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
)

// The reference: what the suite says of containerd's own snapshotter.
func TestReference(t *testing.T) {
	testsuite.SnapshotterSuite(t, "reference", func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		snapshotter, err := overlay.NewSnapshotter(root)
		if err != nil {
			return nil, nil, err
		}
		return snapshotter, snapshotter.Close, nil
	})
}

// The daemon named by SLUICE_SNAPSHOTTER, one for each root.
func TestSluice(t *testing.T) {
	testsuite.SnapshotterSuite(t, "sluice", daemon)
}

func daemon(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
	// A socket's path has at most 107 bytes.
	run, err := os.MkdirTemp("", "sluice-run-")
	if err != nil {
		return nil, nil, err
	}
	address := filepath.Join(run, "s.sock")
	log, err := os.Create(filepath.Join(run, "log"))
	if err != nil {
		return nil, nil, err
	}
	command := exec.Command(os.Getenv("SLUICE_SNAPSHOTTER"), "serve", "--root", root, "--address", address)
	command.Stderr = log
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := command.Start(); err != nil {
		return nil, nil, err
	}
	stop := func() error {
		if err := command.Process.Signal(syscall.SIGTERM); err != nil {
			return err
		}
		err := command.Wait()
		if err != nil {
			text, _ := os.ReadFile(log.Name())
			err = fmt.Errorf("the daemon: %w\n%s", err, text)
		}
		os.RemoveAll(run)
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	connection, err := grpc.DialContext(ctx, "unix://"+address, grpc.WithInsecure(), grpc.WithBlock())
	if err != nil {
		return nil, nil, fmt.Errorf("%w; %v", err, stop())
	}
	cleanup := func() error {
		connection.Close()
		return stop()
	}
	return proxy.NewSnapshotter(api.NewSnapshotsClient(connection), "sluice"), cleanup, nil
}
