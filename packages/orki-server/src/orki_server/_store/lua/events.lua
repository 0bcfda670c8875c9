-- Events: the entries of the event plane that the script writes itself. KEYS[2] and KEYS[3] are the keys of the streams
-- `tasks` and `audit`, and ARGV[2] is the number of entries that each keeps. Without them, and while the outbox has
-- records, all records go to the outbox.
--
-- The tags of the messages are generated from the protos. Entries have a producer of the shard, whose numbers are
-- kept with the shard's clock.

-- One table, as a script has at most 200 local variables.
local EVENTS = { added = 0 }

do
  local char, floor = string.char, math.floor

  local function varint(n)
    if n < 128 then return char(n) end
    if n < 16384 then return char(n % 128 + 128, floor(n / 128)) end
    return char(n % 128 + 128, floor(n / 128) % 128 + 128) .. varint(floor(n / 16384))
  end

  -- The varint of decimal digits, which may exceed Lua's exact numbers.
  local function exact(digits)
    if #digits < 16 then return varint(tonumber(digits)) end
    local high, low, bytes = tonumber(string.sub(digits, 1, -10)), tonumber(string.sub(digits, -9)), {}
    repeat
      local rest = high % 128
      high, low = (high - rest) / 128, low + rest * 1000000000
      local seven = low % 128
      low = (low - seven) / 128
      local more = high > 0 or low > 0
      bytes[#bytes + 1] = char(more and seven + 128 or seven)
    until not more
    return table.concat(bytes)
  end

  local function text(tag, value) return value == '' and '' or tag .. varint(#value) .. value end

  local function number(tag, value)
    value = tonumber(value) or 0
    return value == 0 and '' or tag .. varint(value)
  end

  local NUMBERS = {}

  -- Fences and times, which several records of a batch share.
  local function shared(tag, digits)
    if digits == '' or digits == '0' then return '' end
    local known = NUMBERS[digits]
    if not known then
      known = exact(digits)
      NUMBERS[digits] = known
    end
    return tag .. known
  end

  -- The fields of each kind of TaskEvent, from reason, text and number of the record.
  local DETAILS = {
    submitted = function(t, _, said, size)
      return number(t.request_bytes, size) .. text(t.idempotency_key, said)
    end,
    attempt_ended = function(t, reason, said, wait)
      return number(t.reason, reason) .. text(t.message, said) .. t.retried .. char(1) .. number(t.backoff_ms, wait)
    end,
    cancel_requested = function(t, _, said) return text(t.message, said) end,
    directed = function(t, _, _, size) return number(t.directive_bytes, size) end,
    succeeded = function(t, _, _, size) return number(t.response_bytes, size) end,
    failed = function(t, reason, said) return number(t.reason, reason) .. text(t.message, said) end,
    cancelled = function(t, reason) return number(t.reason, reason) end,
  }

  local function task_event(r)
    local t, kind = TAGS.task_event, r[3]
    local details = DETAILS[kind]
    details = details and details(TAGS.kinds[kind], r[12], r[13], r[14]) or ''
    return text(t.task_id, r[1]) .. text(t.method, r[4]) .. number(t.attempt, r[5]) .. shared(t.fence, r[6])
      .. text(t.agent_id, r[7]) .. text(t.instance_id, r[8]) .. t[kind] .. varint(#details) .. details
  end

  local AUDITED = { submitted = 'submit', cancel_requested = 'cancel', directed = 'direct' }

  local function audit_event(r)
    local t = TAGS.audit_event
    return text(t.actor, r[15]) .. text(t.action, AUDITED[r[3]]) .. text(t.subject, r[1]) .. text(t.outcome, 'accepted')
      .. text(t.detail, r[3] == 'cancel_requested' and r[13] or r[4])
  end

  -- The first 12 bytes of the ids of this script's events. The time makes them new also if the store has lost its tail.
  local function id_prefix()
    local digest = redis.sha1hex(table.concat({ KEYS[1], ARGV[1], EVENTS.wall, EVENTS.tasks, EVENTS.audit }, ' '))
    return (string.gsub(string.sub(digest, 1, 24), '..', function(hex) return char(tonumber(hex, 16)) end))
  end

  local function envelope(r, sequence)
    EVENTS.ids = EVENTS.ids or id_prefix()
    local t, n = TAGS.envelope, EVENTS.added
    EVENTS.added = n + 1
    return t.event_id .. char(16) .. EVENTS.ids .. char(floor(n / 16777216), floor(n / 65536) % 256, floor(n / 256) % 256,
      n % 256) .. text(t.producer, EVENTS.producer) .. t.sequence .. varint(sequence) .. shared(t.time_us, r[11])
      .. text(t.traceparent, r[9]) .. text(t.parent_span_id, r[10])
  end

  local WRITTEN = {}

  local function append(key, limit, r, sequence, message)
    local reply = redis.pcall('XADD', key, 'MAXLEN', '~', limit, '*', 'e', envelope(r, sequence), 'd', message)
    if type(reply) == 'table' and reply.err then return false end
    WRITTEN[#WRITTEN + 1] = { key, reply, EVENTS.tasks, EVENTS.audit }
    if key == KEYS[2] then EVENTS.tasks = sequence else EVENTS.audit = sequence end
    return true
  end

  -- Removes the events of this script after the first `count`, because an event that belongs to them cannot be written.
  function EVENTS.retract(count)
    for at = #WRITTEN, count + 1, -1 do
      redis.pcall('XDEL', WRITTEN[at][1], WRITTEN[at][2])
      EVENTS.tasks, EVENTS.audit, WRITTEN[at] = WRITTEN[at][3], WRITTEN[at][4], nil
    end
    EVENTS.is_open = false
  end

  function EVENTS.written() return #WRITTEN end

  -- Takes the producer of the shard, and its numbers.
  function EVENTS.open(wall, producer, tasks, audit)
    EVENTS.limits = { string.match(ARGV[2], '^(%d+),(%d+)$') }
    EVENTS.wall, EVENTS.tasks, EVENTS.audit = wall, tonumber(tasks) or 0, tonumber(audit) or 0
    EVENTS.producer = producer
      or 'store@' .. string.sub(redis.sha1hex(table.concat({ KEYS[1], ARGV[1], wall }, ' ')), 1, 16)
  end

  local function is_stream(key)
    local reply = redis.pcall('TYPE', key)
    return reply.ok == 'stream' or reply.ok == 'none'
  end

  -- Whether the script can write events.
  function EVENTS.has_streams() return EVENTS.limits[2] ~= nil and is_stream(KEYS[2]) and is_stream(KEYS[3]) end

  -- Whether this script writes events itself. The outbox comes first, so that a task's events stay in order.
  local function is_open()
    if EVENTS.is_open == nil then EVENTS.is_open = EVENTS.has_streams() and redis.pcall('XLEN', OUTBOX) == 0 end
    return EVENTS.is_open
  end

  -- Writes the events of a record. False if it must go to the outbox, as must all after it.
  function EVENTS.add(r, is_moved)
    if not is_moved and not is_open() then return false end
    local before = #WRITTEN
    if AUDITED[r[3]] and not append(KEYS[3], EVENTS.limits[2], r, EVENTS.audit + 1, audit_event(r))
      or not append(KEYS[2], EVENTS.limits[1], r, EVENTS.tasks + 1, task_event(r)) then
      EVENTS.retract(before)
      return false
    end
    return true
  end

  -- The fields of a record of the outbox, or nil if it is damaged.
  function EVENTS.split(packed)
    local fields = { string.match(packed, '^' .. string.rep('([^\31]*)\31', #RECORD_FIELDS - 1) .. '([^\31]*)$') }
    for _, at in ipairs({ 2, 5, 6, 11, 12, 14 }) do
      if not string.find(fields[at] or '', '^%d+$') then return nil end
    end
    return TAGS.kinds[fields[3]] and fields
  end
end
