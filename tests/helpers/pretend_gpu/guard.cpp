// The bookkeeping of devices and streams that torch asks of a CUDA driver, without one.
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <stdexcept>

static thread_local c10::DeviceIndex current_index = 0;
static c10::DeviceIndex device_count = 1;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device getDevice() const override { return {type(), current_index}; }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current_index = device.index(); }
  void setDevice(c10::Device device) const override {
    if (device.index() >= device_count) throw std::runtime_error("CUDA error: invalid device ordinal");
    current_index = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  // None: autograd would ask the driver about each, and start a thread for each.
  c10::DeviceIndex deviceCount() const noexcept override { return 0; }
};

extern "C" void install(int count) {
  static Guard guard;
  device_count = count;
  static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
}
extern "C" void choose(int index) { current_index = index; }
extern "C" int current() { return current_index; }
extern "C" int count() { return device_count; }
